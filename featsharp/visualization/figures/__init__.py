"""The figures of papers on feature upsampling, one module each, named as ``featsharp figure`` names it.

Every module has ``add_arguments(parser)``, its flags, and ``make_figure(arguments)``, which reads the files. It also
has ``draw_...``, a pure function from plain data to a matplotlib figure, to be written with
:func:`featsharp.visualization.style.save`; figures of results have ``read_...`` too, from the content of JSON files of
``featsharp eval`` to that data. None imports torch or matplotlib before it is used, so that help is instant.
"""
