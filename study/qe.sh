export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P gpt*2 PP .2 0
S=photo/cosine,autoencoder/cosine,mixture/cosine,friedman/cosine,photo/constant,mixture/constant
$C $S 1,0.5 0
$P $S PP 1,.1 0
$P gpt*2 PP 1 0
