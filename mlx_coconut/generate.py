from coconut.commands.generate import main
from mlx_coconut.run import make_backend

if __name__ == "__main__":
    main("mlx_coconut", make_backend)
