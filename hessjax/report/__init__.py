"""What the tour found, as data: plain records, tables to read, JSON to keep."""

from hessjax.report._report import LayerRow as LayerRow
from hessjax.report._report import environment as environment
from hessjax.report._report import layer_rows as layer_rows
from hessjax.report._report import prepare as prepare
from hessjax.report._report import to_json as to_json
from hessjax.report._report import write_json as write_json
from hessjax.report._tables import accuracy_table as accuracy_table
from hessjax.report._tables import eigenvalue_table as eigenvalue_table
from hessjax.report._tables import layer_table as layer_table
