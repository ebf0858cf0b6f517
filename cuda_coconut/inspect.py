from coconut.inside.inspect import main
from cuda_coconut.run import make_backend

if __name__ == "__main__":
    main("cuda_coconut", make_backend)
