"""python -m adapruner"""

from adapruner.cli import main

main()
