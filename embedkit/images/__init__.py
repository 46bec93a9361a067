"""From the name of an image to its pixels: bounded reads, decoders, color profiles, and memory that workers share."""
