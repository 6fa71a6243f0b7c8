"""Adapters to frameworks that drive the training loop. Import the one you need; hdet itself imports none of them."""
