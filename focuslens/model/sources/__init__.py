"""Where models come from: GGUF files, wheels on the package index, directories and the hub."""
