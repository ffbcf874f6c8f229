"""What `eval.benchmark_files` has, under the name that the benchmarks of this room know."""

from eval.benchmark_files import field_of as field_of
from eval.benchmark_files import find_file as find_file
from eval.benchmark_files import find_image as find_image
from eval.benchmark_files import read_json_file as read_json_file
from eval.benchmark_files import read_json_lines as read_json_lines
from eval.benchmark_files import read_table as read_table
