"""The tests; a folder for each package of `jaxgpt`, a file for each module."""
