from mlx_vae.convert.command import main

raise SystemExit(main())
