"""Import bit allocations and GPTQ checkpoints of other programs, and export 16-bit checkpoints for programs without
gemq."""

from gemq.interchange.allocation_files import read_allocation
from gemq.interchange.export import Exported, export
from gemq.interchange.gptq_checkpoint import Imported, import_gptq

__all__ = ["Exported", "Imported", "export", "import_gptq", "read_allocation"]
