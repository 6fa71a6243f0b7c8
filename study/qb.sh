export OMP_NUM_THREADS=1
while pgrep -f "qa.sh" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture,friedman,autoencoder,photo,denoiser,snippets,logistic PF,two,G 8,.01 0
$P dropout,digits_mlp,digits_conv,batch_norm,regression,friedman,autoencoder,mixture,photo,snippets PF,two,G 1 1,2
S=photo/cosine,autoencoder/cosine,mixture/cosine,regression/cosine,photo/constant,autoencoder/constant,mixture/constant
$C $S 1,0.5,2 0
$P $S PF .1,1,8 0
$P photo,autoencoder,friedman,mixture,regression PF.400,PF.25r .1,1 0
$P photo,autoencoder,friedman,denoiser,snippets,logistic PF .001,50 0
$P photo,autoencoder,friedman,denoiser,snippets,logistic PF.k.7,PF.k1.4,PF.f.25,PF.f1,PF.u.2,PF.u.8,Ev,PF.n.1,PF.n.4,PF.s.64,PF.s.89 .1,1 0
$P tumours,diabetes,few_texts H.35,H2,H4 .1,1 0
