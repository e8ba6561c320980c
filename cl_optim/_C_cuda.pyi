from cl_optim._C import Plan as Plan
from cl_optim._C import take_step as take_step

def build_info() -> dict[str, str]: ...
