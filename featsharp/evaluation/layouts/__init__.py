"""Readers of data sets in their layouts on disk.

layout          the contract of layouts, and detection of the one of a folder
frames          pixels of a picture that labels lie on, as stored or upright
label_files     numbers and colours of the pixels of label files
labels          images with label files, and the meaning of their numbers
conventions     this meaning, found from the numbers that occur, for the layout "folder"
segmentation    list of the layouts of segmentation, a file each: ade20k, voc, cityscapes, coco_stuff, camvid, folder
class_names     of these data sets
keypoints       pairs of images with keypoints that both show
pairs           layouts of such pairs: SPair-71k, PF-PASCAL, PF-WILLOW
boundaries      pictures with human boundaries: BSDS500 and its like
outlines        objects with class and outline, and their masks
objects         layouts of such objects: COCO, YOLO
detection       the same in pictures to train on and to measure on
mat             MATLAB files
"""
