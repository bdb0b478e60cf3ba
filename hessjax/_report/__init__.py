"""Reports: what was found of a network as data, tables, and one page; the engine behind `hj.report`."""

from hessjax._report._record import LayerRow as LayerRow
from hessjax._report._record import environment as environment
from hessjax._report._record import layer_rows as layer_rows
from hessjax._report._record import prepare as prepare
from hessjax._report._record import to_json as to_json
from hessjax._report._record import write_json as write_json
from hessjax._report._tables import accuracy_table as accuracy_table
from hessjax._report._tables import eigenvalue_table as eigenvalue_table
from hessjax._report._tables import layer_table as layer_table
