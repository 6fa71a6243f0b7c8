export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"
T=digits_mlp,digits_conv,regression,recommender,batch_norm,mixture
$P $T G,Ge,two .1,1 0
$P dropout,tumours G,Ge .1,1 0
$P $T,friedman,autoencoder,photo,denoiser,snippets,logistic G,Ge 8,.01 0
