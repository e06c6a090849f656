"""What it takes to use the package under other libraries, one file a library.

* :mod:`wrappers.integrations.accelerate`
* :mod:`wrappers.integrations.lightning`
* :mod:`wrappers.integrations.transformers`

Each file imports its library, so it is imported by its full name and not from here: the package
itself needs torch alone. Where a library is missing, the import says which extra brings it.

All of them checkpoint the whole block, with its random state, and turn the library's own activation
checkpointing off, with a warning, so that nothing is recomputed twice.
"""
