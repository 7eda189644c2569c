"""The bottom of the pipeline: what flows between the stages. Knows nothing of models or
autoencoders.
"""
