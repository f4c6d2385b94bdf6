"""Semantic correspondence: does a keypoint of one object find the same part of another object of its kind?

``pairs`` says what a pair of annotated images is, ``readers`` finds them in the layouts of the data sets, ``matching``
finds a keypoint's partner by its feature, ``task`` measures.
"""
