"""What a trained model says of a person's own pictures, one file a kind of answer.

Everything is compiled for one shape: a second picture, of whatever size, compiles nothing.
"""
