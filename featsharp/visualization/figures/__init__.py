"""The figures of papers on feature upsampling, one module each: from tensors or result files to a figure.

Every module has ``draw_...``, which takes plain data and returns a matplotlib figure to be written with
:func:`featsharp.visualization.style.save`; those about results also have ``read_...``, which takes the content of JSON
files of ``featsharp eval``.
"""
