"""What a round says, beside the losses."""
