"""Networks and parts of networks that several methods share."""
