"""Zero-shot classification, speech tasks, retrieval, alignment and probes, from an encode callable."""
