"""Publishing: an entry to a folder, a bucket or the Hugging Face Hub, and the index and pages of a zoo."""
