"""Readers of data sets in their layouts on disk.

layout          the contract of layouts, and detection of the one of a folder
labels          images with label files, and the meaning of their numbers
segmentation    layouts of segmentation: ADE20K, Pascal VOC and Context, Cityscapes, COCO-Stuff, CamVid, plain folders
class_names     of these data sets
keypoints       pairs of images with keypoints that both show
pairs           layouts of such pairs: SPair-71k, PF-PASCAL, PF-WILLOW
boundaries      pictures with human boundaries: BSDS500 and its like
objects         objects with class and outline: COCO, YOLO
mat             MATLAB files
"""
