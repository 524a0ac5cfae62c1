"""Zero-shot classification, speech tasks, retrieval, alignment and probes of an encoder."""
