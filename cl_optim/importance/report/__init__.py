"""What an importance log says, shown: a page, pictures, tables, files of figures, TensorBoard.

Public is what ``__all__`` lists. It may import all of ``cl_optim.importance``, but of the log its
type only, since the log draws its reports itself. rich and matplotlib are loaded where something
is drawn with them.
"""

from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import write_csv, write_json
from cl_optim.importance.report.html import render_html, write_html
from cl_optim.importance.report.pictures import write_png
from cl_optim.importance.report.tensorboard import ScalarWriter, add_log
from cl_optim.importance.report.text import render_text

__all__ = [
    "ScalarWriter",
    "add_log",
    "render_html",
    "render_text",
    "report_data",
    "write_csv",
    "write_html",
    "write_json",
    "write_png",
]
