"""Does a run fit devices that are not here, and how fast will it be? Compiles the very training step for them.

Every figure has one of five kinds of evidence (`evidence.Evidence`), which is printed beside it.
"""
