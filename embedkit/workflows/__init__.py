"""What needs images and an encoder both."""
