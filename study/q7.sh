export OMP_NUM_THREADS=1
while pgrep -f "q6.sh" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P photo,autoencoder,friedman,denoiser,snippets,logistic J .001,50 0
S=photo/cosine,autoencoder/cosine,mixture/cosine,regression/cosine,photo/constant,autoencoder/constant,mixture/constant,photo/wsd,mixture/wsd
$C $S 1,0.5,2 0
$P $S J .1,1,8 0
$P photo,autoencoder,friedman,mixture,regression J.400,J.25 .1,1 0
$C gpt*2 1,0.5 0
$P gpt*2 J .2,1 0
