from halftone.cli import main

raise SystemExit(main())
