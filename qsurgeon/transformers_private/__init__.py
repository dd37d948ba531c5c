"""What qsurgeon uses of transformers that is not public, and where its versions differ.

No other module imports such a name, names such an attribute, or asks for the version. Beside each stands in which
versions it was seen; where it says nothing, in all from 5.5.3 to 5.24.0.
"""
