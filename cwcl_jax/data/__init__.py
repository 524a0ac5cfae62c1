"""Sources of examples, processors of each modality and the input pipeline."""
