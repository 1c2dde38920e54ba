"""
`python -m procwatch`.
"""

from procwatch.cli import main

if __name__ == "__main__":
    main()
