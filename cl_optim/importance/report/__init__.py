"""What an importance log says, shown: a page, pictures, tables, files of figures, TensorBoard.

Internal: users have ``ImportanceLog.report``, ``to_tensorboard`` and ``cl-optim report``. It may
import all of ``cl_optim.importance``, but of the log its type only, since the log draws its reports
itself. rich and matplotlib are loaded where something is drawn with them.
"""
