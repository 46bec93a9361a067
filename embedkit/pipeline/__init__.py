"""The folder job: images into a file or a folder of embeddings, resumed after a kill and extended later.

`options` is the one definition of a job's options, `embed` the public function. `job` decides which images remain and
completes the output, `batches` embeds them, `checkpoint` stores shards. `target` is the output, `scope` which rows of
it the sources cover, `report` the progress and the result of a job.
"""
