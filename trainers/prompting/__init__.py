"""The parts that prompting methods are made of. With one method file this folder is all a drop-in needs.

``method`` is the contract that a method implements and ``trainer`` runs it inside Dassl. ``image_batch`` provides image
features, ``text_encoder`` and ``prompts`` text features, ``render``, ``paste`` and ``selection`` the arithmetic of
LoGoPrompt. ``evaluation``, ``checkpoint``, ``feature_store``, ``results`` and ``run_folder`` handle what a run measures
and writes. Dassl is imported by ``trainer``, ``data`` and ``dassl_compat`` only.
"""
