"""Reports: what was found of a network as data and as one page; what `hj.report` and the command run."""

from hessjax._report._record import LayerRow as LayerRow
from hessjax._report._record import environment as environment
from hessjax._report._record import layer_rows as layer_rows
from hessjax._report._record import prepare as prepare
from hessjax._report._record import to_json as to_json
from hessjax._report._record import write_json as write_json
