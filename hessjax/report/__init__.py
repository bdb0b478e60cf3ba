"""What the tour found, as data: plain records, tables to read, JSON to keep."""

from hessjax.report.record import environment as environment
from hessjax.report.record import prepare as prepare
from hessjax.report.record import to_json as to_json
from hessjax.report.record import write_json as write_json
from hessjax.report.tables import LayerRow as LayerRow
from hessjax.report.tables import accuracy_table as accuracy_table
from hessjax.report.tables import eigenvalue_table as eigenvalue_table
from hessjax.report.tables import layer_rows as layer_rows
from hessjax.report.tables import layer_table as layer_table
