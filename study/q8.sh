export OMP_NUM_THREADS=1
while pgrep -f "q7.sh" >/dev/null; do sleep 1; done
P="nice -n 5 ../.venv/bin/python e3.py"
$P photo,autoencoder,friedman,denoiser,snippets,logistic J.k.7,J.k1.4,J.f.25,J.f1,J.u.2,J.u.8,Ev,J.e.7 .1,1 0
$P dropout,digits_mlp,digits_conv,batch_norm,regression J,two 1,.1 1,2
