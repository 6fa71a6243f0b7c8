export OMP_NUM_THREADS=1
P="nice -n 5 ../.venv/bin/python collect.py"
C=digits_mlp,digits_conv,regression,recommender,batch_norm,dropout,autoencoder,denoiser,photo,friedman,mixture,logistic,snippets,tumours
L=char_lm,fine_tune,vision_transformer,gpt,masked_lm,gru
$P $C 0.01,0.1,0.3333,0.2,0.5,2,3,8 0
$P $L 0.1,0.3333,3,8 0
$P $C 0.01,0.1,0.3333,1,2,3,0.5,8 1
$P $L 0.01,0.5,2 0
