export OMP_NUM_THREADS=1
while pgrep -f "e2.py fine" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"
$P autoencoder,photo,friedman,denoiser,snippets,logistic CE.35 .1,1 0
$P autoencoder,photo,friedman,denoiser,snippets,logistic C0 .01,8 0
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture C0 .1,1 0
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture CE.35 .1,1 0
$P gpt*2 C0 .2,1 0
