"""Plans a run on devices that are not attached: compiles its training step for them and reads the result.

Every figure is printed with its kind of evidence (`evidence.Evidence`).
"""
