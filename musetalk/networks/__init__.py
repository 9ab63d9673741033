"""Network layers, named after the keys of the checkpoints they load. Know nothing of files, devices or our modules."""
