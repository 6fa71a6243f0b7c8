OMP_NUM_THREADS=1 PYTHONPATH=.. python lentab.py
