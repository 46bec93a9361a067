"""The folder job: options, job, checkpoint."""
