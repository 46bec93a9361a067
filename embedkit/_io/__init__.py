"""How embedkit touches files: whole writes, locks, bounded reads, and the check of outputs against inputs."""
