"""What is made of a round: the default controller."""
