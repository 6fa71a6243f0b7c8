export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python e3.py"; C="nice -n 5 ../.venv/bin/python collect.py"
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture,dropout PP .1,1 0
$P gpt,fine_tune,char_lm,vision_transformer,gru PP 1,.1 0
$C mixture_adam 0.125 0; $C residual,spiral 8 0; $C few_texts,diabetes 0.0625 0
$P spiral,patches,residual,factors,contrast,mixture_adam,diabetes,few_texts,tumours PP,two .1,1 0
$P dropout,digits_mlp,digits_conv,batch_norm,regression,friedman,autoencoder,mixture,photo,snippets PP,two 1 1
$P digits_mlp,digits_conv,regression,recommender,batch_norm,mixture,friedman,autoencoder,photo,denoiser,snippets,logistic PP,two 8,.01 0
$C gpt*2 1,0.5 0
$P gpt*2 PP .2,1 0
$C gpt_other,lstm 1,0.5 0
$P gpt_other,lstm PP,two 1,.1 0
S=photo/cosine,autoencoder/cosine,mixture/cosine,regression/cosine,photo/constant,mixture/constant
$C $S 1,0.5,2 0
$P $S PP .1,1,8 0
$P photo,autoencoder,friedman,mixture,regression PP.400,PP.25r .1,1 0
$P photo,autoencoder,friedman,denoiser,snippets,logistic PP.k.7,PP.k1.4,PP.f.25,PP.f1,PP.u.2,PP.u.8,PP.6,Ev .1,1 0
