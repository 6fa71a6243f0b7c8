export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P digits_mlp,regression,recommender,mixture,friedman,photo,denoiser,logistic PP 8,.01 0
$C gpt*2 1,.5 0
$P gpt*2 PP 1,.2 0
S=photo/cosine,autoencoder/cosine,mixture/cosine,photo/constant,mixture/constant
$C $S 1,0.5 0
$P $S PP 1,.1 0
$P friedman,photo,autoencoder,logistic PP.k.7,PP.k1.4,PP.u.2,PP.u.8,PP.f.25,PP.f1 .1 0
$P dropout,digits_mlp,digits_conv,batch_norm,regression,friedman,autoencoder PP 1 1
