"""Semantic segmentation with a linear probe on frozen features.

readers     data sets on disk: pairs of image and label
labels      what the numbers in label files mean
features    features of pictures, kept on disk
probe       the head and its training
scores      intersection over union from counts of pixels
task        the evaluation task
"""
