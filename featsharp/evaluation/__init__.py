"""Evaluation: tasks that measure encoders, by one runner.

runner       the contract of a task, and the loop that runs one: progress, bad items, resuming, JSON, tables
estimates    numbers over images with bootstrap intervals
features     the features that tasks compare
head         linear heads trained on frozen features, which are cached on disk
protocol_head  the head of the protocol that papers share, without features of the size of labels
papers       what papers report by that protocol
images       tasks that need images and nothing else
keys         cache keys of encoders and files
layouts/     readers of data sets

All other modules are tasks, one each; ``position_bias`` measures a backbone. The command's list of tasks is
``featsharp.cli.eval.TASKS``.
"""
